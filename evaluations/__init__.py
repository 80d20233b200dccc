"""Data, fine-tuning, attacks, records, reports and the command line."""
