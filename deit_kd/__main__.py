"""`python -m deit_kd` is `deit-kd`."""

from deit_kd.errors import outside_of_the_environment

try:
    from deit_kd.cli import main
except ModuleNotFoundError as error:
    outside_of_the_environment(error)

main()
