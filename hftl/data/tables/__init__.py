"""Readers of table files: CSV, TSV, JSON, JSON Lines and Parquet."""
