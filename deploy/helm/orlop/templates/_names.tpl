{{- define "orlop.labels" -}}
app.kubernetes.io/name: orlop
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "orlop.selector" -}}
app.kubernetes.io/name: orlop
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "orlop.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "orlop.socketDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ .Values.driverName }}
{{- end }}

{{/* Defaults of a map are merged with what a user gives, so the pool that nobody asked for is not one of them. */}}
{{- define "orlop.pools" -}}
{{ .Values.pools | default (dict "default" (dict "backend" "image" "root" "/var/lib/orlop/default")) | toJson }}
{{- end }}

{{/*
What the driver sees of a node for its pools: path to the volume's name and the mount's propagation. A managed pool is
mounted by the driver in the directory above its root, and that mount must be the node's, which outlives the driver.
One that must be mounted is looked at from the directory above, too: a volume of its root alone would be a mount point
in the pod, whatever the node has there.
*/}}
{{- define "orlop.poolPaths" -}}
{{- $paths := dict }}
{{- $pools := include "orlop.pools" . | fromJson }}
{{- range $name, $pool := $pools }}
{{- if $pool.backing }}
{{- if or (eq (dir $pool.root) "/") (eq (dir ($pool.backing.file | default "/dev/x")) "/") }}
{{- fail (printf "pools.%s: root and file of a managed pool must lie in another directory than /" $name) }}
{{- end }}
{{- if not (hasKey $paths (dir $pool.root)) }}
{{- $_ := set $paths (dir $pool.root) (dict "name" (printf "pool-%s" $name) "propagation" "Bidirectional") }}
{{- end }}
{{- else if not $pool.mounted }}
{{- $_ := set $paths $pool.root (dict "name" (printf "pool-%s" $name) "propagation" "HostToContainer") }}
{{- end }}
{{- end }}
{{- range $name, $pool := $pools }}
{{- if and $pool.mounted (not $pool.backing) }}
{{- if eq (dir $pool.root) "/" }}
{{- fail (printf "pools.%s: root of a pool that must be mounted must lie in another directory than /" $name) }}
{{- end }}
{{- if not (hasKey $paths (dir $pool.root)) }}
{{- $_ := set $paths (dir $pool.root) (dict "name" (printf "pool-%s" $name) "propagation" "HostToContainer") }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $pool := $pools }}
{{- with (($pool.backing | default dict).file) }}
{{- if not (hasKey $paths (dir .)) }}
{{- $_ := set $paths (dir .) (dict "name" (printf "backing-%s" $name) "propagation" "HostToContainer") }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $paths }}
{{- end }}

{{/* A value in TOML. Scalars and lists are written as JSON, which TOML reads as well. */}}
{{- define "orlop.toml" -}}
{{- if kindIs "map" . -}}
{{- $keys := list }}
{{- range $key, $value := . }}{{ $keys = append $keys (printf "%s = %s" $key (toJson $value)) }}{{ end -}}
{ {{ join ", " $keys }} }
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* The driver's configuration file. */}}
{{- define "orlop.config" -}}
driver_name = {{ toJson .Values.driverName }}
region = {{ toJson .Values.region }}
zone = {{ toJson .Values.zone }}
{{- range $key, $value := .Values.config }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- range $name, $pool := include "orlop.pools" . | fromJson }}

[pools.{{ $name }}]
{{- range $key, $value := $pool }}
{{ $key }} = {{ include "orlop.toml" $value }}
{{- end }}
{{- end }}
{{- end }}

{{- define "orlop.sharedConfig" -}}
scope = "shared"
driver_name = {{ toJson .Values.shared.driverName }}
{{- range $key, $value := .Values.shared.config }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- range $name, $pool := .Values.shared.pools }}

[pools.{{ $name }}]
{{- range $key, $value := $pool }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}

{{/*
What the driver for file servers sees of a node for its pools (of `root`; `controller`: on the controllers' nodes): path to the
volume's name. Of directories, others mount the filesystem, on the node, whenever they do; one that must be mounted is looked
at from the directory above. Controllers on the server work in the directory that it exports.
*/}}
{{- define "orlop.sharedPoolPaths" -}}
{{- $paths := dict }}
{{- $controller := .controller }}
{{- range $name, $pool := .root.Values.shared.pools }}
{{- if or (eq $pool.backend "directory") (and $pool.on_server $controller) }}
{{- if and $pool.mounted (eq (dir $pool.root) "/") }}
{{- fail (printf "shared.pools.%s: root of a pool that must be mounted must lie in another directory than /" $name) }}
{{- end }}
{{- $path := $pool.root }}
{{- if $pool.mounted }}
{{- $path = dir $pool.root }}
{{- end }}
{{- if not (hasKey $paths $path) }}
{{- $_ := set $paths $path (printf "pool-%s" $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $paths }}
{{- end }}

{{- define "orlop.sharedPoolMounts" -}}
{{- range $path, $name := include "orlop.sharedPoolPaths" . | fromJson }}
- {name: {{ $name }}, mountPath: {{ $path }}, mountPropagation: HostToContainer}
{{- end }}
{{- end }}

{{/* Never made: on a node that lacks the filesystem, a directory of its own would take its place. */}}
{{- define "orlop.sharedPoolVolumes" -}}
{{- range $path, $name := include "orlop.sharedPoolPaths" . | fromJson }}
- name: {{ $name }}
  hostPath: {path: {{ $path }}, type: Directory}
{{- end }}
{{- end }}

{{- define "orlop.sharedSocketDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ .Values.shared.driverName }}
{{- end }}

{{/* Only the driver's own container may mount; a sidecar needs its socket and the network. */}}
{{- define "orlop.sidecarSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "orlop.driverSecurity" -}}
# Mounts, loop devices and mounts that others see need all of it; nothing outside the mounted paths is touched.
privileged: true
readOnlyRootFilesystem: true
{{- end }}

{{- define "orlop.driverMounts" -}}
- {name: config, mountPath: /etc/orlop, readOnly: true}
- {name: socket, mountPath: /csi}
# At kubelet's own path, for kubelet names the targets by it; what is mounted there must appear on the node.
- {name: kubelet, mountPath: {{ .Values.kubeletDir }}, mountPropagation: Bidirectional}
- {name: dev, mountPath: /dev}
- {name: tmp, mountPath: /tmp}
{{- range $path, $volume := include "orlop.poolPaths" . | fromJson }}
- {name: {{ $volume.name }}, mountPath: {{ $path }}, mountPropagation: {{ $volume.propagation }}}
{{- end }}
{{- range $index, $root := .Values.staticRoots }}
- {name: static-{{ $index }}, mountPath: {{ $root }}, mountPropagation: HostToContainer}
{{- end }}
{{- end }}

{{- define "orlop.driverVolumes" -}}
- name: config
  configMap: {name: {{ .Release.Name }}-config}
- name: socket
  hostPath: {path: {{ include "orlop.socketDir" . }}, type: DirectoryOrCreate}
- name: kubelet
  hostPath: {path: {{ .Values.kubeletDir }}, type: Directory}
- name: dev
  hostPath: {path: /dev, type: Directory}
- name: tmp
  emptyDir: {}
{{- range $path, $volume := include "orlop.poolPaths" . | fromJson }}
- name: {{ $volume.name }}
  hostPath: {path: {{ $path }}, type: DirectoryOrCreate}
{{- end }}
{{- range $index, $root := .Values.staticRoots }}
- name: static-{{ $index }}
  hostPath: {path: {{ $root }}, type: Directory}
{{- end }}
{{- end }}
