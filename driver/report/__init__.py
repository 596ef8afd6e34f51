"""The receipt as one HTML page: no network, no file beside it, no script but ours; names from a model are text and nothing else."""
