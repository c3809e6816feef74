"""What the commands answer before they import LeRobot and torch: help, versions, and mistakes on the command line.

A package of its own beside `lerobot_policy_pi_rl`, whose import takes ten seconds.
"""
