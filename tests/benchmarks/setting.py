"""What every benchmark sets before it imports a library: no network, no progress bars, packages of this checkout."""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "FT_PACKAGE_CACHE": os.environ.get("FT_PACKAGE_CACHE", str(REPOSITORY / ".cache" / "packages")),
}
sys.path.insert(0, str(REPOSITORY))
