"""How work starts and where it lives: jobs, whole files, launch guard, run folders, metric log, progress."""
