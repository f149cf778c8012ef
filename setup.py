"""Metadata is in pyproject.toml; compiled libraries will be declared here."""

from setuptools import setup

setup()
