"""What a run needs besides the algorithm: options, rows, the run's folder, processes, plan, page."""
