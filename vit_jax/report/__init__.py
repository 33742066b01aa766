"""`report.html`: what a run or an evaluation came to, in one file that any browser shows, without a network.

`collect` makes numbers of answers and metrics, `draw` pictures of numbers, `page` the page of both.
"""

from vit_jax.report.page import FILE
from vit_jax.report.predictions import known_labels, of_predictions
from vit_jax.report.run import of_run

__all__ = ["FILE", "known_labels", "of_predictions", "of_run"]
