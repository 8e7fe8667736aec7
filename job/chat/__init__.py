"""Conversations: messages, chat templates, and their token ids with a loss mask.

Training, evaluation, generation and the remote client share one form of a conversation. Where
conversations come from is the business of `data` and `evals`; what a model does with the token
ids, that of `model`.
"""
