"""Everything that a GPU can verify and time, in one command: ``python -m bench.gpu.check`` (``make gpu-check``).

``check``        the steps in order, their time budgets, the summary
``machine``      a GPU, or the interpreter in its place: timing, environment, ceilings
``suite``        the kernel tests on the GPU, in parallel processes
``sanitize``     the smallest launches under compute-sanitizer
``integration``  streams, CUDA graphs, torch.compile, torch.export
``ops``          single kernels: checked, then timed beside cuBLAS and SDPA
``models``       whole converted models: checked, then timed beside bf16
``roofline``     bytes and operations of every kernel, and the time that they take at least
``goals``        what must be reached, and whether it was
``report``       the tables of the summary and of docs/gpu.md
``tune``         the tables of ``vitq_kernels/tuning``, from the configurations of ``candidates``
``warm``         compiles ahead, beside the tests, what will be timed

Runs from a checkout, installed or not, with torch, triton, timm, pytest and hypothesis; a calibration needs pydantic.
"""

from .. import PATHS, RESULTS, ROOT, environment  # noqa: F401
