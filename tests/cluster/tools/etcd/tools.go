// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package tools names the program that this module builds, for go.mod's sake.
package tools

import _ "go.etcd.io/etcd/server/v3"
