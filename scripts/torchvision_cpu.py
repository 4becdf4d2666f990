"""Let torchvision import beside a CPU build of torch.

torchvision's Linux wheels are compiled against CUDA. Beside a CPU-only torch their C++ library
doesn't load, which torchvision survives, except that it then registers fake kernels for two
operators that library would have declared. Where that happens, this puts a start-up hook into the
environment it is run with: it declares the two operators just before torchvision's first import,
and nothing else. Everything that this project uses of torchvision is Python; calling the C++
operators (`nms` and the like) still raises torchvision's own clear error.

Run again after another torch or torchvision was installed: a hook that isn't needed any more is
removed. Where there is no torchvision, there is nothing to do.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = """"Declares what torchvision's CUDA-built library would: see scripts/torchvision_cpu.py."
import sys

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch
        if torch.version.cuda is None:
            self.lib = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                self.lib.define(op + BOXES)
            keep.append(self)


keep = []
sys.meta_path.insert(0, _BeforeTorchvision())
"""


def imports() -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True
    )


def main():
    site = Path(sysconfig.get_path("purelib"))
    hook, start = site / "_torchvision_cpu.py", site / "_torchvision_cpu.pth"
    for o in (start, hook):
        o.unlink(missing_ok=True)
    if importlib.util.find_spec("torchvision") is None:
        return
    first = imports()
    if first.returncode == 0:
        return
    if "operator torchvision::nms does not exist" not in first.stderr:
        sys.exit(first.stderr)
    # The start-up line comes last: without the hook it would complain at every start of Python.
    hook.write_text(HOOK)
    start.write_text("import _torchvision_cpu\n")
    second = imports()
    if second.returncode:
        for o in (start, hook):
            o.unlink()
        sys.exit(second.stderr)
    print("torchvision: its CUDA operators are declared, not loaded (CPU build of torch)")


if __name__ == "__main__":
    main()
