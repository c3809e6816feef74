"""The flow policies that PI-RL can train, each behind one adapter."""
