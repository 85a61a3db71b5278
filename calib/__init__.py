"""Calibration: data, statistics of the sites' inputs, block-wise training of what a recipe leaves to learn."""

from splitq_jax.calib.blocks import data_mesh as data_mesh
from splitq_jax.calib.reconstruction import FitConfig as FitConfig
from splitq_jax.calib.reconstruction import fit as fit
from splitq_jax.calib.run import Run as Run
from splitq_jax.calib.run import fingerprint as fingerprint
from splitq_jax.calib.site_errors import site_errors as site_errors
from splitq_jax.calib.statistics import collect as collect
