"""Results as pages for people: report, comparison, model card, plots and the verdict's sentence.

Everything here is a function of results that are already computed; nothing is measured, and no
store is read.
"""
