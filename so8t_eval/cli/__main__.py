"""Run ``so8t-eval`` as ``python -m so8t_eval.cli``."""

from so8t_eval.cli import main

if __name__ == "__main__":
    main(prog_name="so8t-eval")
