"""All metadata is in setup.cfg; this file only lets older tools find it."""

from setuptools import setup

setup()
