"""`python -m harness.cli`: the command line where no `harness` script is installed."""

from harness.cli import main

if __name__ == "__main__":
    main()
