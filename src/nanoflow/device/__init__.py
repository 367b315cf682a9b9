"""The machine: which device there is and how much memory it has free."""
