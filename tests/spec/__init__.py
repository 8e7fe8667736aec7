"""Specs, and the smallest of them."""

BASE = """\
name: doctor
model:
  preset: tiny
data:
  dataset: samples
  prompt: "{input}"
  response: "{output}"
"""
