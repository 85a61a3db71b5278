"""Evaluation: questions, the harness that scores them, metrics, and the report."""

from splitq_jax.eval.easy_vqa import Example as Example
from splitq_jax.eval.easy_vqa import packed_batches as packed_batches
from splitq_jax.eval.harness import Result as Result
from splitq_jax.eval.harness import evaluate as evaluate
from splitq_jax.eval.page import write as write
from splitq_jax.eval.report import Channels as Channels
from splitq_jax.eval.report import Report as Report
from splitq_jax.eval.report import Row as Row
from splitq_jax.eval.report import Sample as Sample
from splitq_jax.eval.report import row_of as row_of
from splitq_jax.eval.report import table as table
