"""Tests of the evaluations: questions, answers, scores and their certainty."""
