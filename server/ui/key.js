// Asking for the API key, where the server wants one.

import { forgetKey, hasKey, isPossibleKey, setKey } from "./api.js";
import { $ } from "./dom.js";

/** Returns ask(): opens the dialog. `given` is called once there is a new key. */
export function startKeyDialog(given) {
  const dialog = $("key-dialog");
  const showForget = () => { $("forget-key").hidden = !hasKey(); };

  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    if (!isPossibleKey(key)) {
      $("key-error").textContent = "A key holds letters, digits and signs, without blanks.";
      return;
    }
    setKey(key);
    $("key").value = "";
    showForget();
    dialog.close();
    given();
  });
  $("key-cancel").addEventListener("click", () => dialog.close());
  $("forget-key").addEventListener("click", () => { forgetKey(); showForget(); given(); });
  showForget();

  return function ask() {
    if (dialog.open) return;
    $("key-error").textContent = hasKey() ? "The server did not accept this key." : "";
    dialog.showModal();
  };
}
