"""``python -m vitq``: the ``vitq`` command, as launchers such as torchrun start it."""

from .cli import main

raise SystemExit(main())
