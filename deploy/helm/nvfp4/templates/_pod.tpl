{{- /* Metadata and spec of a pod. rank: empty for a server that is one pod, else leader or worker of a group. */ -}}
{{- define "nvfp4.pod" -}}
{{- $rank := .rank -}}
{{- with .root -}}
{{- if and .Values.allowUnauthenticated .Values.apiKeys.secret }}
{{- fail "allowUnauthenticated is true and apiKeys.secret is set: clear one of them" }}
{{- end -}}
metadata:
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  labels:
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- include "nvfp4.selector" . | nindent 4 }}
    {{- with $rank }}
    app.kubernetes.io/component: {{ . }}
    {{- end }}
spec:
  serviceAccountName: {{ include "nvfp4.name" . }}
  automountServiceAccountToken: false
  # With them, a Service called nvfp4 would set NVFP4_PORT=tcp://..., which the server reads as its flag --port.
  enableServiceLinks: false
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    seccompProfile:
      type: RuntimeDefault
  terminationGracePeriodSeconds: {{ add .Values.shutdown.drainDelaySeconds .Values.shutdown.timeoutSeconds 10 }}
  {{- if not $rank }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "nvfp4.selector" . | nindent 10 }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .Values.tolerations (eq .Values.device "cuda") }}
  tolerations:
    {{- if eq .Values.device "cuda" }}
    - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
    {{- end }}
    {{- with .Values.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: nvfp4
      image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion .Values.device) }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        - /model
        {{- if .Values.allowUnauthenticated }}
        - --allow-unauthenticated
        {{- else }}
        - --api-key-file=/etc/nvfp4/keys
        {{- end }}
        - --metrics-port=9100
        - --drain-delay={{ .Values.shutdown.drainDelaySeconds }}
        - --shutdown-timeout={{ .Values.shutdown.timeoutSeconds }}
        - --log-format=json
        - --device={{ .Values.device }}
        {{- if $rank }}
        - --tensor-parallel-size={{ .Values.tensorParallel.pods }}
        {{- end }}
        {{- range $flag, $value := .Values.flags }}
        {{- if kindIs "bool" $value }}
        {{- if $value }}
        - --{{ $flag }}
        {{- end }}
        {{- else }}
        - {{ printf "--%s=%v" $flag $value | quote }}
        {{- end }}
        {{- end }}
      {{- if $rank }}
      env:
        - {name: MASTER_PORT, value: "29500"}
      {{- end }}
      {{- if ne $rank "worker" }}
      ports:
        - name: http
          containerPort: 8000
        - name: metrics
          containerPort: 9100
      startupProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: 360
      readinessProbe:
        httpGet: {path: /health/ready, port: http}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /health/live, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      {{- end }}
      {{- $resources := deepCopy .Values.resources }}
      {{- if eq .Values.device "cuda" }}
      {{- $_ := set $resources.limits "nvidia.com/gpu" (toString .Values.gpus) }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: model
          mountPath: /model
          readOnly: true
          {{- with .Values.model.subPath }}
          subPath: {{ . }}
          {{- end }}
        {{- if not .Values.allowUnauthenticated }}
        - {name: keys, mountPath: /etc/nvfp4, readOnly: true}
        {{- end }}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        {{- if $rank }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
  volumes:
    - name: model
      persistentVolumeClaim:
        claimName: {{ .Values.model.claim }}
        readOnly: true
    {{- if not .Values.allowUnauthenticated }}
    - name: keys
      secret:
        secretName: {{ .Values.apiKeys.secret }}
        defaultMode: 0440
    {{- end }}
    - name: cache
      emptyDir: {sizeLimit: 2Gi}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    {{- if $rank }}
    # NCCL between processes of one pod; counts as memory.
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 2Gi}
    {{- end }}
{{- end -}}
{{- end -}}
