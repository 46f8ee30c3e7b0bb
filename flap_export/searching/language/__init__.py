"""Operators by prompt: a language model is asked for rates, and its answers are brought to the budget.

notation       candidates as text
prompts        what is asked
parsing        what an answer says
proposers      whoever answers: a server (`openai_server`), a model in this process (`local_model`), or a journal
asking         one question with its retries, noted in the journal
language_model the operators
"""
