"""What `report.py` is made of: request and run directories in, tables, statistics, plots and pages out.

records (what was run) -> comparison (arms, pairs, verdicts; its numbers from statistics) -> plots, page
"""
