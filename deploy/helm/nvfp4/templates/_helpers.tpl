{{- define "nvfp4.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "nvfp4.selector" -}}
app.kubernetes.io/name: nvfp4
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "nvfp4.labels" -}}
{{ include "nvfp4.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "nvfp4.metadata" -}}
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "nvfp4.labels" .root | nindent 4 }}
{{- end -}}
