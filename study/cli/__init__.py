"""The command `mebm`."""
