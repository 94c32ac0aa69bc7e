"""Run ``so8t-train`` as ``python -m so8t_train.cli``."""

from so8t_train.cli import main

if __name__ == "__main__":
    main(prog_name="so8t-train")
