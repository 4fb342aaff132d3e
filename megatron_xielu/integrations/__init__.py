"""Our activation inside models of other libraries; each module needs its library installed."""
