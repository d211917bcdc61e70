"""The cases in Triton's interpreter, in a process of its own: the choice is made when triton is imported.

`python -m tests.unit.kernels.triton.interpreted` runs them all and prints how many there were of each op.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.unit.kernels.triton.cases import Case, cases, check_refusals


def hollow() -> None:
    """Makes every launch do nothing, as if the kernels' bodies were empty."""
    from triton.runtime.jit import KernelInterface

    KernelInterface.__getitem__ = lambda self, grid: lambda *args, **kwargs: None  # type: ignore[method-assign]


def fails(case: Case) -> bool:
    try:
        case.check(torch.device("cpu"))
    except (AssertionError, IndexError):  # a poisoned token may be no index
        return True
    return False


def main(only: str) -> None:
    """Runs the cases whose op or name contains `only`, and prints the number of cases by op. `--part=I/N` runs every N-th case from the
    I-th on; `--hollow` instead prints those that empty kernels would pass.
    """
    cpu, done = torch.device("cpu"), Counter[str]()
    torch.set_num_threads(1)
    if only == "--hollow":
        hollow()
        sys.stdout.write("".join(f"{case.op}/{case.name}\n" for case in cases(full=False) if not fails(case)))
        return
    first, step = 0, 1
    if only.startswith("--part="):
        first, step = (int(number) for number in only.removeprefix("--part=").split("/"))
        only = ""
    for case in list(cases(full=False))[first::step]:
        if only in case.op or only in case.name:
            case.check(cpu)
            done[case.op] += 1
    done["refusals"] = check_refusals(cpu)
    sys.stdout.write("\n".join(f"{op} {count}" for op, count in sorted(done.items())) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
