"""The engine and its parts as users meet them: server, front end, scheduler, sampling, limits, start, CPU decode."""
