"""Rows to tokens: read a table, see what is what, split, render, audit, order. Only `collate` makes tensors."""
