"""The commands of `mebm`: one module each, with a command (`study.cli.options`) of the module's name."""
