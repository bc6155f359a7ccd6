"""What several tests share: ranks on this machine, small models, real text."""
