"""Stand in for `latentdiff.training` in a checkout, where its files lie in the folder `training/` beside this package.

An installed package has them in `latentdiff/training/`, which Python prefers to this file.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_folder = Path(__file__).resolve().parents[1] / "training"
_spec = spec_from_file_location(__name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)])
if _spec is None or _spec.loader is None or not (_folder / "__init__.py").is_file():
    raise ImportError(f"{_folder} must hold the training code, and is not there; install latentdiff again")
sys.modules[__name__] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
