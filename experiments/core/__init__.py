"""What every experiment is run by: cells, plans, the loop, engines, reports."""
