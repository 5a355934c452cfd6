"""`upslope fetch`: bring a model into the cache now, for work offline later."""

import json

from upslope.models.files.folders import provenance
from upslope.models.files.sources import resolve
from upslope.options import FetchOptions


def run(options: FetchOptions) -> int:
    """Print the model's local folder and where it came from; raise ModelError when it cannot be had."""
    folder = resolve(options.model)
    record = provenance(folder)
    if options.json:
        print(json.dumps({"folder": str(folder), "source": record}, ensure_ascii=False))
    else:
        print(folder, *(f"  {key}: {value}" for key, value in record.items()), sep="\n")
    return 0
