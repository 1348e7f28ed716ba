// Shows the API. Relative addresses, so that the gateway may be behind another server's folder.
SwaggerUIBundle({ url: "../openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
