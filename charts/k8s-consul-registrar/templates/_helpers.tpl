{{- define "registrar.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Labels that never change while a release lives. */ -}}
{{- define "registrar.stableLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "registrar.labels" -}}
{{ include "registrar.stableLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "registrar.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{- define "registrar.priorityClass" -}}
{{- if or .Values.priorityClass.create .Values.priorityClass.name -}}
{{- default (include "registrar.fullname" .) .Values.priorityClass.name -}}
{{- end -}}
{{- end -}}

{{- /* True if the registrar's Pods may overlap: none writes, or an election says which. */ -}}
{{- define "registrar.rolls" -}}
{{- if or (eq .Values.consul.backend "none") (gt (int .Values.registrar.replicas) 1) -}}true{{- end -}}
{{- end -}}

{{- /* The text of a setting: lists with commas, numbers without an exponent. */ -}}
{{- define "registrar.text" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{- /* Variables of a container: those that follow from other values, under the settings given by name. */ -}}
{{- define "registrar.env" -}}
{{- range $name, $value := merge (dict) .settings .derived }}
- name: {{ $name }}
  value: {{ include "registrar.text" $value | quote }}
{{- end }}
{{- with .more }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "registrar.probes" -}}
readinessProbe:
  httpGet:
    path: /readyz
    port: admin
  periodSeconds: 5
livenessProbe:
  httpGet:
    path: /healthz
    port: admin
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{- define "registrar.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end -}}

{{- /* The name of a Secret with a bearer token: given, generated, or empty for none. */ -}}
{{- define "registrar.tokenSecret" -}}
{{- if .token.existingSecret -}}
{{- .token.existingSecret -}}
{{- else if .token.generate -}}
{{- printf "%s-%s-token" (include "registrar.fullname" .root) .of -}}
{{- end -}}
{{- end -}}

{{- define "registrar.tokenKey" -}}
{{- if .existingSecret -}}{{- .key -}}{{- else -}}token{{- end -}}
{{- end -}}

{{- /* A Secret with a generated token; an upgrade keeps the token that is there. */ -}}
{{- define "registrar.generatedToken" -}}
{{- if and .token.generate (not .token.existingSecret) }}
{{- $name := include "registrar.tokenSecret" . }}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace $name }}
apiVersion: v1
kind: Secret
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "registrar.labels" .root | nindent 4 }}
type: Opaque
data:
  {{- if and $found $found.data (hasKey $found.data "token") }}
  token: {{ $found.data.token }}
  {{- else }}
  token: {{ randAlphaNum 48 | b64enc }}
  {{- end }}
{{- end }}
{{- end -}}
