"""`python -m deit_kd` is `deit-kd`."""

from deit_kd.cli import main

main()
