"""`python -m study.cli`: the command `mebm`."""

from _mebm_study import main

main()
