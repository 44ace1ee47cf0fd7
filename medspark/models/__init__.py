"""Networks: encoders by name, their pyramid, densify, decoder, SparK."""

from medspark.models.decoder import LightDecoder
from medspark.models.densify import Densify
from medspark.models.encoders import (
    create_encoder,
    encoder_from_spec,
    encoder_names,
    encoder_spec,
)
from medspark.models.pyramid import Level, Pyramid, find_levels
from medspark.models.spark import SparK, SparKOutput, TargetOptions, build_spark, spark_spec

__all__ = [
    "Densify",
    "Level",
    "LightDecoder",
    "Pyramid",
    "SparK",
    "SparKOutput",
    "TargetOptions",
    "build_spark",
    "create_encoder",
    "encoder_from_spec",
    "encoder_names",
    "encoder_spec",
    "find_levels",
    "spark_spec",
]
