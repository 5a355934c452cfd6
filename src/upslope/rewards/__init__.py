"""Everything that judges: functions, how near texts are, frozen networks, reward models, and their weighted sum."""
