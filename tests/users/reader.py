"""Do what a page says, top to bottom: run as a program in the environment and folder of a reader.

Reads blocks as JSON from standard input. Blocks of Python share one interpreter, blocks of bash are run by `bash -e` in
between; where a page shows what is printed, that is compared. Ends with status 1 at the first block that fails.
Needs nothing but the standard library.
"""

import contextlib
import io
import json
import subprocess
import sys
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker


def main() -> int:
    namespace = {"__name__": "__main__"}
    for block in json.load(sys.stdin):
        print(f"== {block['place']}", file=sys.stderr, flush=True)
        if block["language"] == "python":
            code = compile("\n" * (block["line"] - 1) + block["text"], block["page"], "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            output = printed.getvalue()
        else:
            done = subprocess.run(
                ["bash", "-e", "-c", block["text"]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
            )
            output = done.stdout
            if done.returncode != 0:
                print(f"{block['place']} ended with status {done.returncode}\n{output}", file=sys.stderr)
                return 1
        expected = block["printed"]
        if expected is not None and not OutputChecker().check_output(expected, output, ELLIPSIS | NORMALIZE_WHITESPACE):
            print(f"{block['place']} prints\n{output}\nand not\n{expected}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
