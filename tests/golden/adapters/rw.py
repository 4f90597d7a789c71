"""AffinityNet + random walk (PSA)."""
