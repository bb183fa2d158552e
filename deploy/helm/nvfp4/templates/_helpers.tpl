{{- define "nvfp4.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "nvfp4.selector" -}}
app.kubernetes.io/name: nvfp4
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Of the pods that answer HTTP: of a group of ranks, the first. */ -}}
{{- define "nvfp4.answering" -}}
{{ include "nvfp4.selector" . }}
{{- if include "nvfp4.grouped" . }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end -}}

{{- /* Not empty where a server is a group of pods. */ -}}
{{- define "nvfp4.grouped" -}}
{{- if gt (int .Values.tensorParallel.pods) 1 -}}yes{{- end -}}
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
