"""Training in latents: encoded now or before, the run is the same; what it makes is decoded, exported, and sampled by stock diffusers."""

import json
import re
from dataclasses import fields

import frozen
import numpy as np
import pytest
import torch
from conftest import DIT, curve_of, run_train
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image

import sample
import train
from data import encode
from data.encoders import Autoencoder
from data.options import Options
from pipeline.config import Config, DataConfig
from pipeline.flow import Purpose, normal
from pipeline.fold import check_export, stock_autoencoder
from pipeline.folder import open_folder
from pipeline.recipe import as_mapping, build, parse
from pipeline.space import Space
