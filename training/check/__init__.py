"""`latentdiff train --check`: everything a run needs, tried before it starts."""
