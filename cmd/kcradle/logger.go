package main

import (
	"context"
	"log/slog"
	"strings"
)

// logLevel is the level of a logger as --log-level takes it.
func logLevel(l *slog.Logger) string {
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn} {
		if l.Enabled(context.Background(), level) {
			return strings.ToLower(level.String())
		}
	}
	return "error"
}
