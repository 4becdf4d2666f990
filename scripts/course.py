"""`make course`: the book's recipe against ours, on the drawn set, each trained for about as long.

    python scripts/course.py [option of sota-train …]

Epochs are fixed, not seconds, so that the same command gives the same numbers on the same machine;
on two cores each side takes about twenty seconds. The files go to `runs`.
"""

import sys

from sota_course.training.command import Diverged
from sota_course.training.options import command_line, read_options, run_name
from sota_course.training.session import run_training, session_table

# The drawn set is small, so the book's recipe gets smaller batches, and a learning rate to match.
BOOK = "--preset book --epochs 2 --bs 32 --lr 8e-3 --name course-book"
FAST = "--preset fast --epochs 7 --name course-fast"
HOW_ON = """NLL and ECE say what the stated probabilities are worth: less is better. Chapter 1
explains the table, and the chapters behind it what makes the difference.

The picture:      {picture}
Your own images:  sota-train --preset fast --data <folder with train/<class> and val/<class>>
All options:      sota-train --help (the command is in .venv/bin)"""


def train(
    line,  # the options of one side
    more,  # those that were typed, for both
):
    "The results of one side, and how its files begin."
    options = read_options([*line.split(), "--overwrite", *more])
    print(f"\n== {command_line(options)}\n", flush=True)
    return run_training(options), f"{options.out}/{run_name(options)}"


def main(more):
    book, _ = train(BOOK, more)
    fast, files = train(FAST, more)
    print(f"\n== Both, in about the same time\n\n{session_table(book, fast)}\n")
    print(HOW_ON.format(picture=f"{files}-seed{fast[0].seed}.png"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nStopped: make course starts again from the beginning.")
    except (Diverged, ValueError, OSError) as e:
        sys.exit(f"make course: {e}")
