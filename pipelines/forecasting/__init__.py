"""Forecasting: tables of series in, forecasts with intervals out."""
